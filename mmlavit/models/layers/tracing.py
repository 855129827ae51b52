"""Whether a compiler, an exporter or a tracer reads the code that runs."""
import torch

# Not in torch 2.1, which does not compile LaViT.
is_compiling = getattr(torch.compiler, 'is_compiling', lambda: False)
# Then sizes are symbols, which must not be compared with numbers.
is_exporting = getattr(torch.compiler, 'is_exporting', lambda: False)
# Then sizes are tensors.
is_tracing = torch.jit.is_tracing
