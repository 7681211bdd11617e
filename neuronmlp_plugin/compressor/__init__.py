"""A printed plan, a run layer by layer that can be resumed, and a report of predicted against achieved
error.
"""
