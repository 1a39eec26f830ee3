"""Style priors: sweeps, the paper's experiment, a comparison with prompting and LoRA, speed."""
