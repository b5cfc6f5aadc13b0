"""How good a model is: texts in every layout, tasks, tables beside the paper's."""
