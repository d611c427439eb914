"""What a model costs, from shapes alone: parameters, operations, memory."""
