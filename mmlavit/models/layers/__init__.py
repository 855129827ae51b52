"""From grids to stages: what the backbone is made of."""
