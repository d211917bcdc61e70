"""The policy lab: a run's trace, and the real scheduler and planner replayed over it in virtual time, without a model."""
