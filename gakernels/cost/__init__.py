"""The cost of a model, computed from shapes alone: parameters, operations, memory."""
