"""A pacing of your own: the second half of the clusters opens twice as fast as the first."""

from dataclasses import dataclass

from diffusers import DDPMScheduler

from diffusers_curriculum import CurriculumTimestepSampler
from diffusers_curriculum.pacing import PACINGS, Pacing


@PACINGS.register("slow_then_fast")
@dataclass(frozen=True)
class SlowThenFast(Pacing):
    stage_steps: int = 100

    def stage(self, state: dict, step: int, stages: int) -> int:
        half, slow = stages // 2, self.stage_steps
        if step < half * slow:
            return 1 + step // slow
        return min(stages, 1 + half + (step - half * slow) // (slow // 2))

    def expected_steps(self, stages: int) -> float:
        half = stages // 2
        return half * self.stage_steps + (stages - 1 - half) * (self.stage_steps // 2)


if __name__ == "__main__":
    sampler = CurriculumTimestepSampler.from_scheduler(
        DDPMScheduler(), clusters=6, pacing="slow_then_fast", pacing_args={"stage_steps": 10}
    )
    print([sampler.stage(step) for step in range(0, 60, 5)])
