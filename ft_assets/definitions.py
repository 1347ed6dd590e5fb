"""Where assets, checks, jobs, sensors and resources meet. Reads as the flow of a task."""

import dagster as dg

from ft_assets import automation
from ft_assets.data import assets as data
from ft_assets.data import checks as data_checks
from ft_assets.evaluation import assets as evaluation
from ft_assets.evaluation import checks as evaluation_checks
from ft_assets.monitoring import assets as monitoring
from ft_assets.monitoring import checks as monitoring_checks
from ft_assets.release import assets as release
from ft_assets.release import checks as release_checks
from ft_assets.training import assets as training
from ft_assets.training import checks as training_checks
from ft_resources.resources import platform_resources

STAGES = (data, training, evaluation, release, monitoring)
CHECKS = (data_checks, training_checks, evaluation_checks, release_checks, monitoring_checks)

defs = dg.Definitions(
    assets=[asset for stage in STAGES for asset in dg.load_assets_from_modules([stage])],
    asset_checks=[check for stage in CHECKS for check in dg.load_asset_checks_from_modules([stage])],
    jobs=[automation.train_and_release, automation.monitor_day],
    sensors=[automation.task_files, automation.traffic, automation.retraining, automation.priorities],
    resources=platform_resources(),
    # steps are thin: the heavy ones launch a process of their own, so a process per step would only add its start
    executor=dg.in_process_executor,
)
