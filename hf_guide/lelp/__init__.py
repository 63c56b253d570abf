"""LELP: pseudo-subclasses from the linear structure of a teacher's embeddings."""
