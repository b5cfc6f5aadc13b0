"""How good a model is: log-probabilities of texts in every layout, tasks, tables beside the paper's."""
