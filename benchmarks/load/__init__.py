"""A server under many clients of which a third leaves: that it stays up, flat and clean."""
