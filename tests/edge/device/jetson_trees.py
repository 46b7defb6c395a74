"""Fake roots of Jetsons: the files of sysfs, procfs and /etc that the runtime reads.

Paths and values as devices show them in public logs; a symbolic link stands where sysfs has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

AGX = "NVIDIA Jetson AGX Orin Developer Kit"
NVPMODEL = """# comment < POWER_MODEL ID=9 NAME=NOT_ME >
< PARAM TYPE=FILE NAME=CPU_ONLINE >
< POWER_MODEL ID=0 NAME=MAXN >
CPU_ONLINE CORE_0 1
< POWER_MODEL ID=1 NAME=MODE_15W >
< POWER_MODEL ID=2 NAME=MODE_30W >
< POWER_MODEL ID=3 NAME=MODE_50W >
< PM_CONFIG DEFAULT=2 >
"""
MEMINFO = "MemTotal:       64350472 kB\nMemFree:  100 kB\nMemAvailable:   51200000 kB\n"


def write_tree(root: Path, files: Mapping[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def ina3221(directory: str, channels: Mapping[str, tuple[int, int]]) -> dict[str, str | bytes]:
    """A hwmon of three channels: label to millivolts and milliamperes."""
    files: dict[str, str | bytes] = {f"{directory}/name": "ina3221\n"}
    for channel, (label, (millivolts, milliamperes)) in enumerate(channels.items(), 1):
        files[f"{directory}/in{channel}_label"] = f"{label}\n"
        files[f"{directory}/in{channel}_input"] = f"{millivolts}\n"
        files[f"{directory}/curr{channel}_input"] = f"{milliamperes}\n"
    files[f"{directory}/in7_label"] = "sum of shunt voltages\n"
    files[f"{directory}/in7_input"] = "99999\n"
    files[f"{directory}/curr7_input"] = "99999\n"
    return files


def rails(gpu: int, cpu: int, system: int) -> dict[str, tuple[int, int]]:
    """The channels of the first monitor of AGX Orin, from milliamperes."""
    return {
        "VDD_GPU_SOC": (20000, gpu),
        "VDD_CPU_CV": (20000, cpu),
        "VIN_SYS_5V0": (5000, system),
    }


def zones(temperatures: Mapping[str, int | None]) -> dict[str, str | bytes]:
    """Thermal zones by type, in millidegrees; None is a sensor without a reading."""
    files: dict[str, str | bytes] = {}
    for number, (name, millidegrees) in enumerate(temperatures.items()):
        files[f"sys/class/thermal/thermal_zone{number}/type"] = f"{name}\n"
        if millidegrees is not None:
            files[f"sys/class/thermal/thermal_zone{number}/temp"] = f"{millidegrees}\n"
    return files


def cooling(states: Mapping[str, int]) -> dict[str, str | bytes]:
    files: dict[str, str | bytes] = {}
    for number, (name, state) in enumerate(states.items()):
        files[f"sys/class/thermal/cooling_device{number}/type"] = f"{name}\n"
        files[f"sys/class/thermal/cooling_device{number}/cur_state"] = f"{state}\n"
    return files


def dpkg(versions: Mapping[str, str]) -> str:
    return "".join(
        f"Package: {name}\nStatus: install ok installed\nVersion: {version}\n\n"
        for name, version in {"bash": "5.1", **versions, "zsh": "5.8"}.items()
    )


def agx_orin_jetpack6(root: Path) -> Path:
    """JetPack 6.2 on AGX Orin 64GB, mode MAXN, under load."""
    gpu = "sys/devices/platform/bus@0/17000000.gpu"
    write_tree(
        root,
        {
            "proc/device-tree/model": f"{AGX}\0",
            "proc/meminfo": MEMINFO,
            "proc/self/status": "Name:\tpython3\nVmRSS:\t  123456 kB\n",
            "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: "
            "generic, EABI: aarch64, DATE: Wed Jan  8 01:49:37 UTC 2025\n",
            "etc/nvpmodel.conf": NVPMODEL,
            "var/lib/nvpmodel/status": "pmode:0000",
            "var/lib/dpkg/status": dpkg(
                {"nvidia-l4t-core": "36.4.3-20250107174145", "nvidia-jetpack": "6.2+b77"}
            ),
            f"{gpu}/load": "987\n",
            f"{gpu}/of_node/name": "gpu\0",
            f"{gpu}/devfreq/17000000.gpu/cur_freq": "1300500000\n",
            f"{gpu}/devfreq/17000000.gpu/max_freq": "1300500000\n",
            f"{gpu}/devfreq/17000000.gpu/min_freq": "306000000\n",
            "sys/devices/platform/15340000.vic/of_node/name": "vic\0",
            "sys/devices/platform/15340000.vic/devfreq/15340000.vic/cur_freq": "729600000\n",
            "sys/class/hwmon/hwmon0/name": "pwmfan\n",
            "sys/class/hwmon/hwmon2/name": "soctherm_oc\n",
            "sys/class/hwmon/hwmon2/oc1_event_cnt": "0\n",
            "sys/class/hwmon/hwmon2/oc2_event_cnt": "1\n",
            "sys/class/hwmon/hwmon2/oc3_event_cnt": "4\n",
            "sys/class/hwmon/hwmon2/oc1_throt_en": "1\n",
            **ina3221(
                "sys/class/hwmon/hwmon3",
                {
                    "VDD_GPU_SOC": (20000, 800),
                    "VDD_CPU_CV": (20000, 100),
                    "VIN_SYS_5V0": (5000, 1000),
                },
            ),
            **ina3221("sys/class/hwmon/hwmon4", {"NC": (5000, 7), "VDDQ_VDD2_1V8AO": (5000, 300)}),
            **zones(
                {
                    "cpu-thermal": 51500,
                    "gpu-thermal": 48125,
                    "cv0-thermal": None,
                    "cv1-thermal": -256000,
                    "tj-thermal": 52000,
                }
            ),
            # The case is hot from 70 degrees on, which holds no clocks down.
            **cooling({"pwm-fan": 3, "cpu-throttle-alert": 0, "hot-surface-alert": 1}),
        },
    )
    vic = "sys/devices/platform/15340000.vic"
    for name, device in (("17000000.gpu", gpu), ("15340000.vic", vic)):
        (root / device / "devfreq" / name / "device").symlink_to(root / device)
        devfreq = root / "sys/class/devfreq"
        devfreq.mkdir(parents=True, exist_ok=True)
        (devfreq / name).symlink_to(root / device / "devfreq" / name)
    return root


def agx_orin_jetpack7(root: Path) -> Path:
    """JetPack 7.2 on AGX Orin: another bus path, no load file, no nv_tegra_release; it is hot."""
    gpu = "sys/class/devfreq/17000000.gpu"
    return write_tree(
        root,
        {
            "proc/device-tree/model": f"{AGX}\0",
            "proc/meminfo": MEMINFO,
            "etc/nvpmodel.conf": NVPMODEL.replace("MODE_", ""),
            "var/lib/nvpmodel/status": "pmode:0003\n",
            "var/lib/dpkg/status": dpkg({"nvidia-l4t-core": "39.2.0-20260603120000"}),
            f"{gpu}/cur_freq": "612000000\n",
            f"{gpu}/max_freq": "828750000\n",
            f"{gpu}/min_freq": "0\n",
            f"{gpu}/governor": "nvhost_podgov\n",
            **ina3221(
                "sys/class/hwmon/hwmon10",
                {
                    "VDD_GPU_SOC": (20000, 500),
                    "VDD_CPU_CV": (20000, 50),
                    "VIN_SYS_5V0": (5000, 900),
                },
            ),
            **zones({"gpu-thermal": 99500, "tj-thermal": 100250}),
            **cooling({"gpu-throttle-alert": 1, "hot-surface-alert": 1, "devfreq-17000000.gpu": 4}),
        },
    )


def orin_nano_jetpack6(root: Path) -> Path:
    """JetPack 6 on Orin Nano: one rail is the input of the whole module."""
    return write_tree(
        root,
        {
            "proc/device-tree/model": "NVIDIA Jetson Orin Nano Developer Kit\0",
            "sys/class/devfreq/17000000.gpu/cur_freq": "1020000000\n",
            **ina3221(
                "sys/class/hwmon/hwmon1",
                {"VDD_IN": (5000, 3000), "VDD_CPU_GPU_CV": (5000, 1200), "VDD_SOC": (5000, 500)},
            ),
        },
    )


def thor_jetpack7(root: Path) -> Path:
    """JetPack 7 on Thor: other names of the GPU, and a second kind of power monitor."""
    return write_tree(
        root,
        {
            "proc/device-tree/model": "NVIDIA Jetson AGX Thor Developer Kit\0",
            "sys/class/devfreq/gpu-gpc-0/cur_freq": "1575000000\n",
            "sys/class/devfreq/gpu-nvd-0/cur_freq": "1692000000\n",
            "sys/class/hwmon/hwmon5/name": "ina238\n",
            "sys/class/hwmon/hwmon5/in1_label": "VIN\n",
            "sys/class/hwmon/hwmon5/power1_input": "45000000\n",
            **ina3221("sys/class/hwmon/hwmon4", {"VDD_GPU": (19700, 1000)}),
        },
    )
