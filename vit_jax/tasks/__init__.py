"""What is optimised and measured, one module a task."""
