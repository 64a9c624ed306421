"""Training: the step, the loop around it, its optimizer, schedule, hooks and checkpoints. Import from the modules."""
