"""What the cuda backend does on a real GPU: tests and figures for `make gpu`, each part by itself."""
