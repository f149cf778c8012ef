"""The paper's own tables (arXiv 1702.03044): ImageNet, centre crop, top-1 and top-5 error in percent."""

# Table 1, 5 bits: the reference's errors, INQ's.
T1 = {
    "AlexNet": ((42.76, 19.77), (42.61, 19.54)),
    "VGG-16": ((31.46, 11.35), (29.18, 9.70)),
    "GoogLeNet": ((31.11, 10.97), (30.98, 10.72)),
    "ResNet-18": ((31.73, 11.31), (31.02, 10.90)),
    "ResNet-50": ((26.78, 8.76), (25.19, 7.55)),
}
# Table 2, ResNet-18 at 5 bits.
T2 = {"random": (32.11, 11.73), "magnitude": (31.02, 10.90)}
# Table 3, ResNet-18.
T3 = {32: (31.73, 11.31), 5: (31.02, 10.90), 4: (31.11, 10.99), 3: (31.92, 11.64), 2: (33.98, 12.87)}
# Table 4, ResNet-18, ternary.
T4 = {"BWN": (39.20, 17.00), "TWN": (38.20, 15.80), "INQ": (33.98, 12.87)}
# Table 5, AlexNet: bits of convolutions and Linear layers, ratio, decrease of the errors. No ratio is quoted for the
# third row here.
T5 = {
    "Deep Compression, P+Q, 8/5 bits": ("27×", (0.00, 0.03)),
    "Deep Compression, P+Q+H, 8/5 bits": ("35×", (0.00, 0.03)),
    "Deep Compression, P+Q+H, 4/2 bits": ("", (-1.99, -2.60)),
    "DNS + INQ, 5 bits": ("53×", (0.08, 0.03)),
    "DNS + INQ, 4 bits": ("71×", (-0.52, -0.20)),
    "DNS + INQ, 3 bits": ("89×", (-1.47, -0.96)),
}
