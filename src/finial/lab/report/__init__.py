"""Reports: records as Markdown, CSV, one HTML page, and charts.

from finial.lab.report.markdown import render
"""
