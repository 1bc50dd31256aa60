"""The training loop and what it needs: recipe, stages, optimizer, health, signals."""
