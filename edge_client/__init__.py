"""The edge: the pipeline, its command line and its web gateway.

Nothing of what is drawn here may be told to anybody, so the reports that libraries send to their vendors are off before
anything of this package can import them: ONNX Runtime's (a device id in the home folder, events) by the variable that
it reads at its import, OpenVINO's (an event to an analytics service at each import) by hiding the package that sends.
"""

import os
import sys

os.environ["ORT_DISABLE_TELEMETRY"] = "1"
sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # importing it fails, and OpenVINO takes its stub
