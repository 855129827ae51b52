"""Models at work: what they attend to, what they cost, what they logged."""
from .measures import MEASURES, Similarity
from .observe import Layer, observe_layers

__all__ = ['MEASURES', 'Layer', 'Similarity', 'observe_layers']
