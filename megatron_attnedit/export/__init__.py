"""A student, or a teacher, as a Hugging Face directory."""
