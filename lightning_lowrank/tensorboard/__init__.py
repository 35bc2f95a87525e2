"""The tab "Low rank" of TensorBoard. Imports nothing else of the package and no torch: TensorBoard loads it in its own
process.
"""
