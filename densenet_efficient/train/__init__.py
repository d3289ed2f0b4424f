"""Training: data sets, recipes, the training loop and its checkpoints. May import `models`,
`memory` and below."""
