import sys,time,torch
from benchmarks.depthbench import models, hop_models, aligned_models
from types import SimpleNamespace as S
models=S(**vars(models),**{k:v for k,v in {**vars(hop_models),**vars(aligned_models)}.items() if k not in vars(models)})
models.T5=lambda: aligned_models.interchanged(False,5)
models.T6=lambda: aligned_models.interchanged(True,6)
torch.set_num_threads(1)
f=getattr(models,sys.argv[1]); s=time.process_time(); t=f(); print(sys.argv[1], t.steps, t.losses, time.process_time()-s)
torch.save(t.module.state_dict(), f"/tmp/fam/{sys.argv[1]}.pt")
