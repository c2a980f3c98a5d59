"""Where everything lies: the geometry of layers, patterns of weights, and plans, which are both together."""

__all__: list[str] = []
