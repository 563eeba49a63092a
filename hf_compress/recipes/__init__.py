"""Recipes: several stages in one file, checked before they start, skipped if nothing changed, resumed if killed."""
