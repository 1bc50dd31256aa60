"""Replace the attention of a trained language model and distil the new one, on Megatron-Core.

The folders follow the data, and a folder imports only from those before it::

    device          which machine is this: cuda, npu or cpu
    convert         Hugging Face <-> Megatron weights
    core_attention  softmax(q k) v: backends, windows, context parallelism
    attention       the student attentions, MLA and GateSWA
    models          teacher, and student = teacher with its attention replaced
    planning        memory, GPU hours, what a server holds
    data            texts, token files, batches
    distill         the losses of stage 1 and stage 2
    export          a student as a Hugging Face directory, and in an engine
    checkpoint      checkpoints of every format
    training        recipe, edit, loop
    evaluate        how far is the student from the teacher
"""

__version__ = "0.1.0"
