"""Projectors between the features of student and teacher."""
