"""`longdraft bench`: tokens per second of a job, each run in a process of its own, beside what a user would pick instead."""
