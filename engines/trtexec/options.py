"""Lists the options that each version of ``trtexec`` knows.

Source: the option parser in ``samples/common/sampleOptions.cpp`` of github.com/NVIDIA/TensorRT, on
the branches ``release/8.6``, ``release/10.0`` to ``release/10.16``, ``release/11.0`` and
``release/11.1``. 11.1 is the newest public one; a later version is taken to have the options of
11.1.

``trtexec`` stops at an unknown option, so the right set matters.
"""

from __future__ import annotations

from dataclasses import dataclass

from engines.rules.table import Release

# The versions that a user can ask about: JetPack 6.1 and 6.2, JetPack 7.2, JetPack 7.2.2.
TRT_VERSIONS: dict[str, Release] = {"10.3": (10, 3), "10.16": (10, 16), "11.4": (11, 4)}

_IN_8_6 = """
    allowGPUFallback avgRuns avgTiming batch best buildDLAStandalone buildOnly
    builderOptimizationLevel calib consistency deploy device directIO dumpLayerInfo dumpOutput
    dumpProfile dumpRawBindingsToFile dumpRefit duration dynamicPlugins excludeLeanRuntime
    explicitBatch explicitPrecision exportLayerInfo exportOutput exportProfile exportTimes
    exposeDMA fp16 fp8 hardwareCompatibilityLevel help heuristic idleTime
    ignoreParsedPluginLibs infStreams inputIOFormats int8 iterations layerDeviceTypes
    layerOutputTypes layerPrecisions leanDLLPath loadEngine loadInputs maxAuxStreams maxBatch
    maxShapes maxShapesCalib memPoolSize minShapes minShapesCalib minTiming model
    nativeInstanceNorm ni noBuilderCache noDataTransfers noTF32 nvtxMode onnx optShapes
    optShapesCalib output outputIOFormats percentile persistentCacheRatio plugins
    precisionConstraints preview profilingVerbosity refit restricted safe saveEngine
    separateProfileRun setPluginsToSerialize shapes skipInference sleepTime sparsity
    staticPlugins streams tacticSources tempdir tempfileControls threads timeDeserialize
    timeRefit timingCacheFile uff uffInput uffNHWC useCudaGraph useDLACore useManagedMemory
    useRuntime useSpinWait vc verbose versionCompatible warmUp workspace
"""
# (version, what it added, what it removed)
_CHANGES: tuple[tuple[Release, str, str], ...] = (
    (
        (10, 0),
        """
        allocationStrategy allowWeightStreaming bf16 calibProfile dumpOptimizationProfile
        errorOnTimingCacheMiss getPlanVersionOnly markDebug noCompilationCache pi
        pluginInstanceNorm profile saveDebugTensors stripWeights stronglyTyped useProfile
        weightStreamingBudget weightless
        """,
        """
        batch buildOnly deploy explicitBatch explicitPrecision heuristic maxBatch minTiming model
        nativeInstanceNorm ni nvtxMode output uff uffInput uffNHWC workspace
        """,
    ),
    ((10, 1), "int4 stripAllWeights", ""),
    ((10, 2), "runtimePlatform", ""),
    ((10, 4), "maxTactics", "consistency"),
    ((10, 6), "monitorMemory", ""),
    ((10, 7), "asyncFileReader", ""),
    ((10, 8), "l2LimitForTiling tilingOptimizationLevel", ""),
    ((10, 11), "uint8AsymmetricQuantizationDLA", ""),
    (
        (10, 12),
        "distributiveIndependence markUnfusedTensorsAsDebugTensors saveAllDebugTensors",
        "",
    ),
    ((10, 13), "consistency dumpKernelText remoteAutoTuningConfig safetyPlugins", ""),
    ((10, 14), "decomposableAttentions refitFromOnnx", ""),
    ((10, 15), "cpuOnly enablePluginOverride", ""),
    ((10, 16), "adjustForDLA reportCapabilityDLA", ""),
    (
        (11, 0),
        "includeDataTransfers noCudaGraph noSpinWait",
        """
        best bf16 calib calibProfile fp16 fp8 int4 int8 layerOutputTypes layerPrecisions
        maxShapesCalib minShapesCalib optShapesCalib precisionConstraints restricted weightless
        """,
    ),
    (
        (11, 1),
        """
        accuracyAlgorithm accuracyThreshold atol continue dryRun helpBuildRoute loadRefOutputs
        refPair rtol saveAllEngines setBuildRoute tuneBuildRouteFile tuneBuildRoutes
        tuningCacheFile tuningResultFile tuningSearch tuningTimeOut
        """,
        "",
    ),
)


@dataclass(frozen=True)
class Lifetime:
    """The versions in which an option came and went.

    Attributes:
        added: the version that brought it; None if 8.6 had it already.
        removed: the first version without it; None if it still exists.
    """

    added: Release | None
    removed: Release | None


def options(version: Release) -> frozenset[str]:
    """List the options, with their dashes, that ``trtexec`` of a version takes."""
    known = set(_IN_8_6.split())
    for changed, added, removed in _CHANGES:
        if changed <= version:
            known |= set(added.split())
            known -= set(removed.split())
    return frozenset(f"--{name}" for name in known)


def lifetime(option: str) -> Lifetime | None:
    """Tell when an option came and went; None for one that no version ever had."""
    name = option.removeprefix("--")
    added: Release | None = None
    removed: Release | None = None
    known = name in _IN_8_6.split()
    for version, came, went in _CHANGES:
        if name in came.split():
            known, removed = True, None
            added = added or (None if name in _IN_8_6.split() else version)
        elif name in went.split():
            removed = version
    return Lifetime(added, removed) if known else None


def show(version: Release) -> str:
    """Format a version for people, e.g. ``10.16``."""
    return f"{version[0]}.{version[1]}"
