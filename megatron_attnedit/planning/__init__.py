"""What a run or a served student needs, from shapes alone: memory, communication, arithmetic."""
