"""Models written as graphs; knows no backend and no file."""
