"""A vLLM plug-in: the students that are no model of vLLM's own.

vLLM finds it by its entry point. A student attention that needs it has a package ``vllm`` beside
its configuration, which imports nothing of Megatron, so neither Megatron-Core nor a process group
is needed where it serves. MLA students need no plug-in: they are of classes that vLLM has.
"""

from megatron_attnedit.export.packages import packages


def register() -> None:
    """Tell vLLM of the classes; called by vLLM in each of its processes."""
    for package in packages("vllm"):
        package.register()
