"""Whether a compiler, an exporter or a tracer reads the code that runs."""
import torch

# Neither is in torch 2.1, which does not compile LaViT.
is_compiling = getattr(torch.compiler, 'is_compiling', lambda: False)
_says_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)
# Then sizes are tensors.
is_tracing = torch.jit.is_tracing


def is_exporting() -> bool:
    """Then sizes are symbols, which must not be compared with numbers.

    Within torch.compile torch's own answer is yes too (2.11), and there it is no.
    """
    return _says_exporting() and not torch.compiler.is_dynamo_compiling()
