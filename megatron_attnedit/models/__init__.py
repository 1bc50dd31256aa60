"""Teacher and student as Megatron models."""
