"""Memory planned before a step and measured during one. May import `nn` and below."""
