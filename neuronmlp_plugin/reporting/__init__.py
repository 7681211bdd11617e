"""What a compression leaves for people to look at: one HTML page and a model card, both made from
`neuronmlp_report.json` alone.
"""
