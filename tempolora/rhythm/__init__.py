"""The rhythm terms: pure tensor mathematics that knows no model and no file."""
