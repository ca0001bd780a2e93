"""The search: the space, what runs next, the driver of a study, and several processes on one."""
