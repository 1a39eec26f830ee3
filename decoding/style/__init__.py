"""Style priors: from a text to what is added to a step's scores."""
