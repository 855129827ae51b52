"""Less attention for models of other classes: ViT, DeiT, PVT and Swin."""
from .add import add_less_attention
from .convert import ConvertedLayer, LessAttentionPlan

__all__ = ['ConvertedLayer', 'LessAttentionPlan', 'add_less_attention']
