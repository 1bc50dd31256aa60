"""How far a student is from its teacher, and what its cache costs."""
