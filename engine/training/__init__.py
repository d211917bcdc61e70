"""Drafter training: prompts, answers and hidden states, the trainable backbone, losses, the loop, calibration and export."""
