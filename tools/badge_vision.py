"""First phase: the vision tower and the projector learn to read frames.

Every token of a frame has to say all that the frame shows, by itself, to linear heads that are
thrown away. Heads over the joined tokens of a frame would leave digits and colour in different
tokens, and the language model would have to put them together in two hops, which it does not learn.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import LlavaOnevisionForConditionalGeneration

from tools.badge_bank import NUM_COLOURS, Bank
from tools.badge_config import HIDDEN_SIZE, TOKENS_PER_FRAME

BATCH_FRAMES: Final = 128
WARM_UP_STEPS: Final = 50
IDLE_SHARE: Final = 0.1
HEAD_SIZES: Final = (10, 10, NUM_COLOURS, 2)
"""Classes of the heads: tens, ones, colour, whether there is a badge."""


def embed_frames(model: LlavaOnevisionForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Return the tokens of frames, (num_frames, TOKENS_PER_FRAME, HIDDEN_SIZE), no newline."""
    tokens: Tensor = model.get_video_features(pixels[None]).pooler_output
    return tokens[0, :-1].view(len(pixels), TOKENS_PER_FRAME, HIDDEN_SIZE)


from offload.video.badge_model import badge_pixels
def train_vision(model, bank: Bank, num_steps: int, learning_rate: float, seed: int):
    generator = torch.Generator().manual_seed(seed)
    heads = nn.ModuleList(nn.Linear(HIDDEN_SIZE, size) for size in HEAD_SIZES)
    parts = [model.model.vision_tower, model.model.multi_modal_projector, heads]
    params=[p for part in parts for p in part.parameters()]
    opt = torch.optim.AdamW(params, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    sched = torch.optim.lr_scheduler.OneCycleLR(opt, learning_rate, num_steps, pct_start=0.1)
    num_idle = int(BATCH_FRAMES * IDLE_SHARE)
    t0=time.process_time()
    badges=bank.badges
    for step in range(num_steps):
        rows = torch.cat([torch.randint(bank.num_shown, (BATCH_FRAMES-num_idle,), generator=generator),
          torch.randint(bank.num_shown, len(bank.images), (num_idle,), generator=generator)])
        shown = rows[:-num_idle]
        tok = embed_frames(model, badge_pixels([bank.images[r] for r in rows]))
        ls=[]; ac=[]
        tg=[badges[shown]//10, badges[shown]%10, bank.colours[shown]]
        for h,t in zip(heads[:3],tg):
            lo=h(tok[:-num_idle]); t=t[:,None].expand(-1,4)
            ls.append(cross_entropy(lo.flatten(0,1),t.flatten())); ac.append((lo.argmax(-1)==t).float().mean().item())
        ev=torch.ones(BATCH_FRAMES,4,dtype=torch.long); ev[-num_idle:]=0
        ls.append(cross_entropy(heads[3](tok).flatten(0,1),ev.flatten()))
        loss=sum(ls)
        opt.zero_grad(); loss.backward(); nn.utils.clip_grad_norm_(params,1.0); opt.step(); sched.step()
        if step%50==0 or step==num_steps-1: print(step, round(loss.item(),3), [round(a,3) for a in ac], round(time.process_time()-t0,1), flush=True)
    return heads
