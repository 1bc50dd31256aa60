"""A third student attention, as small as one can be: the teacher's, sliding in every layer."""
