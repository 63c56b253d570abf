"""From a budget to a student's shape: enumerate the shapes that a budget allows, count them exactly, and rank them.

`budget` parses what is allowed; `fields` finds the config's size fields through the family's layout; `counting` counts
parameters from shapes; `enumeration` lists the shapes; `candidates` has their score by a rule, `scoring` that by starts on
calibration data; `search` ties these together. Works for families whose layout names their axes and whose stacks have one
width (decoders, encoders, encoder-decoders, ViTs); not for stages of several widths, or models nested in models.
"""
