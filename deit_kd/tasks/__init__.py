"""What can be learned: a task for each value of the recipe's key `task`; see `deit_kd.training.task.Task`."""

from deit_kd.tasks.classification import Classification

TASKS = {"classification": Classification}
