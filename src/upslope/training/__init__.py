"""One optimizer update, and what makes a run stop, save and continue."""
