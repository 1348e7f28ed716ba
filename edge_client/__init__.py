"""The edge: the pipeline, its command line and its web gateway.

Nothing of what is drawn here may be told to anybody, so ONNX Runtime's own reports (a device id in the home folder,
events to its vendor) are off before anything of this package can import it. It looks at the variable at its import.
"""

import os

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
