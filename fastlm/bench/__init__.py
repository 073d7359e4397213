"""Measurements for `fastlm bench`: our backends beside eager PyTorch and the other libraries, in one run.

What runs side by side is measured in turns, one round each, so that a machine that slows down slows all of them down.
A speed-up is the median over the rounds of the ratio of two neighbours in time, with its quartiles. The numbers that
were computed are checked in the same run. A peer that is missing, or fails, is listed with the reason.
"""
