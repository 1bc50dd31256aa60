"""Replace the attention of a trained language model and distil the new one, on Megatron-Core.

The folders follow the data, and a folder imports only from those before it::

    device      which machine is this: cuda, npu or cpu
    convert     Hugging Face <-> Megatron weights
    attention   the student attentions, MLA and GateSWA
    models      teacher, and student = teacher with its attention replaced
    distill     the losses of stage 1 and stage 2
    training    recipe, data, loop, checkpoints
    export      a student as a Hugging Face directory
    evaluate    how far is the student from the teacher
"""

__version__ = "0.1.0"
