"""The Hub: records of a student, its model card, saving and pushing it."""
