"""Evaluation of the methods: the unintended tasks, the three metrics, the table and the figures."""
