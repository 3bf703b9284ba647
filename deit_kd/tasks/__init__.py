"""What is learned: the terms of a step, evaluation, and the checks before the first step."""
